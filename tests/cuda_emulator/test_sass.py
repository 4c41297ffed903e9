"""The count of instructions per turn of a loop, on machine code written for it."""

from __future__ import annotations

from tests.cuda_emulator import sass

# Rows of steps. A row takes one of two branches, shuffles, and may leave the kernel.
NEST = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_rows:
        /*0010*/                   LDG.E R2, desc[UR6][R4.64] ;
        /*0020*/               @P0 BRA `(.L_x_else) ;
        /*0030*/                   FADD R3, R3, R3 ;
        /*0040*/                   FADD R3, R3, R3 ;
        /*0050*/                   BRA `(.L_x_steps) ;
.L_x_else:
        /*0060*/                   FADD R3, R3, R3 ;
.L_x_steps:
        /*0070*/                   LDS.64 R6, [R8+UR4] ;
        /*0080*/                   LDS.64 R10, [R8.X4] ;
        /*0090*/                   FFMA R3, R6, R7.reuse, R3 ;
        /*00a0*/                   BRA.U !UP0, `(.L_x_steps) ;
        /*00b0*/                   BRA.DIV UR4, `(.L_x_diverged) ;
        /*00c0*/                   SHFL.BFLY PT, R4, R5, 0x8, 0x1f ;
.L_x_joined:
        /*00d0*/               @P1 EXIT ;
        /*00e0*/              @!P2 BRA `(.L_x_rows) ;
        /*00f0*/                   EXIT ;
.L_x_diverged:
        /*0100*/                   WARPSYNC.COLLECTIVE R28, `(.L_x_met) ;
        /*0110*/                   SHFL.BFLY P2, R4, R5, R29, R32 ;
        /*0120*/                   ENDCOLLECTIVE ;
.L_x_met:
        /*0130*/                   BRA `(.L_x_joined) ;
.L_x_trap:
        /*0140*/                   BRA `(.L_x_trap);
        /*0150*/                   NOP;
"""


def test_a_turn_is_the_longest_path_without_inner_loops_and_diverged_warps() -> None:
    outside, rows, steps = sass.loops(NEST)
    assert (outside.depth, outside.names) == (0, ["LDC", "EXIT"])
    assert rows.depth == 1
    assert " ".join(rows.names) == "LDG.E BRA FADD FADD BRA BRA.DIV SHFL.BFLY EXIT BRA"
    assert (steps.depth, steps.names) == (2, ["LDS.64", "LDS.64", "FFMA", "BRA.U"])
    assert (steps.gathers, steps.count("LDS"), steps.count("FFMA"), rows.count("LDG")) == (
        2, 2, 1, 1,
    )  # fmt: skip


def test_loops_side_by_side_are_not_nested() -> None:
    text = """
.L_x_a:
        /*0000*/                   LDS.64 R6, [R8] ;
        /*0010*/               @P0 BRA `(.L_x_a) ;
.L_x_b:
        /*0020*/                   LDS.64 R6, [R8] ;
        /*0030*/                   LDS.64 R6, [R8] ;
        /*0040*/                   NOP ;
        /*0050*/               @P0 BRA P1, `(.L_x_b) ;
        /*0060*/                   EXIT ;
"""
    found = sass.loops(text)
    assert [(loop.depth, len(loop.names)) for loop in found] == [(0, 1), (1, 2), (1, 3)]
    assert sass.nest(found) == [found[0], found[2]]


def test_two_back_edges_to_one_header_are_one_loop() -> None:
    text = """
.L_x_a:
        /*0000*/                   LDS.64 R6, [R8] ;
        /*0010*/               @P0 BRA `(.L_x_a) ;
        /*0020*/                   FADD R6, R6, R6 ;
        /*0030*/               @P0 BRA `(.L_x_a) ;
        /*0040*/                   EXIT ;
"""
    assert [len(loop.names) for loop in sass.loops(text)] == [1, 4]
