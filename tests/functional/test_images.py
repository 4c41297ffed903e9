"""Images: accepted in the layout of the connectivity, refused in the other one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dendrite_kernels as dk
from dendrite_kernels import models

H, W, C = 4, 5, 3
LAYERS = pytest.mark.parametrize("make", [dk.DendriticLayer, dk.SparseLinear])


def layer(make: type, channels: int = C, first: bool = False) -> torch.nn.Module:
    rule = dk.connectivity.local_receptive_fields
    fields = rule((H, W), 6, 2, 4, channels=channels, channels_first=first, seed=0)
    torch.manual_seed(0)
    made: torch.nn.Module = make(fields)
    return made


@LAYERS
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("lead", [(), (2,), (2, 7)])
@pytest.mark.parametrize("compiled", [False, True])
def test_colour(make: type, first: bool, lead: tuple[int, ...], compiled: bool) -> None:
    net = layer(make, first=first)
    x = torch.randn(*lead, *((C, H, W) if first else (H, W, C)))
    function = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
    expected = net(x.flatten(-3))
    assert expected.shape[:-1] == lead
    assert torch.equal(function(x), expected)


@LAYERS
def test_layouts_see_the_same_pixels(make: type) -> None:
    """The picture moved to the other layout excites the same fields, in weights moved alike."""
    last, first = layer(make), layer(make, first=True)
    images = torch.zeros(H * W * C, C, H, W)
    images.flatten(1).fill_diagonal_(1)  # one pixel of one channel each
    with torch.no_grad():
        for net in (last, first):
            for p in net.parameters():
                p.fill_(0.5)
    a, b = first(images), last(images.movedim(1, 3).contiguous())
    assert torch.allclose(a, b)
    assert len(a.unique()) > 1


@LAYERS
def test_one_channel(make: type) -> None:
    net = layer(make, channels=1)
    x = torch.randn(7, H, W)
    expected = net(x.flatten(1))
    assert torch.equal(net(x), expected)
    assert torch.equal(net(x[:, None]), expected)  # [B, 1, H, W], as torch has them
    assert net(x[None, None]).shape[:3] == (1, 1, 7)  # [..., H, W] otherwise


@LAYERS
@pytest.mark.parametrize("first", [False, True])
def test_the_other_layout_is_refused_by_name(make: type, first: bool) -> None:
    net = layer(make, first=first)
    x = torch.randn(2, *((H, W, C) if first else (C, H, W)))
    with pytest.raises(ValueError, match=f"draw the connectivity with channels_first={not first}"):
        net(x)


@LAYERS
@pytest.mark.parametrize("shape", [(2, C, W, H), (2, H, W, C, 1), (H, W), (2, 59)])
def test_other_shapes_are_refused(make: type, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Expected x of shape \[\.\.\., 60\], got"):
        layer(make)(torch.randn(shape))


@pytest.mark.parametrize("kind", [kind for kind in models._KINDS if kind not in ("vANN", "psANN")])
def test_networks(kind: Any) -> None:
    x = torch.randn(3, C, H, W)
    options = {"channels": C, "layers": 2, "seed": 0}
    net = dk.models.build(kind, (H, W), 4, 2, 3, 10, channels_first=True, **options)
    assert torch.equal(net(x), net(x.flatten(1)))
    with pytest.raises(ValueError, match="channels_first=False"):
        net(x.movedim(1, 3))
    last = dk.models.build(kind, (H, W), 4, 2, 3, 10, **options)
    assert torch.equal(last(x.movedim(1, 3)), last(x.movedim(1, 3).flatten(1)))
    grey = dk.models.build(kind, (H, W), 4, 2, 3, 10, channels_first=True, seed=0)
    assert torch.equal(grey(x[:, :1]), grey(x[:, 0].flatten(1)))


def test_networks_read_states_from_before_they_took_images() -> None:
    net = dk.models.build("dANN-R", (H, W), 4, 2, 3, 10, seed=0)
    c = net[0].connectivity
    assert isinstance(c, dk.Connectivity)
    old = dk.Connectivity(c.crow_indices, c.col_indices, c.soma_ptr, c.in_features)
    net.load_state_dict(nn.Sequential(dk.DendriticLayer(old), nn.Linear(4, 10)).state_dict())
    assert net(torch.randn(3, 1, H, W)).shape == (3, 10)
