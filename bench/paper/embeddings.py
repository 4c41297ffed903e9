"""Activities of trained networks in two dimensions, and how well they keep classes apart.

Source: Chavlis & Poirazi (2025), Methods. The table of a sweep has no weights, so that the networks
that are drawn here are trained anew; equal runs give equal networks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bench.environment import write_json
from bench.paper.datasets import load
from bench.paper.measures import activities
from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.splits import Split
from bench.paper.statistics import best, plain
from bench.paper.training import train

IMAGES = 1000  # of the test set, chosen at random; t-SNE of all 10,000 takes minutes
NEIGHBOURS = 10
FILE = "embeddings.json"


@dataclass(frozen=True)
class Embedding:
    """One stage of one trained network.

    silhouette: of the classes in the plane, -1..1.
    trustworthiness: whether neighbours in the plane are neighbours in the activities, 0..1.
    neighbourhood: the part of the NEIGHBOURS nearest activities that have the image's own class.
    """

    run: Run
    stage: str  # dendrites or somas, of the first layer
    points: list[tuple[float, float]]
    classes: list[int]
    silhouette: float
    trustworthiness: float
    neighbourhood: float


@torch.no_grad()
def embed(model: nn.Sequential, data: Split, run: Run, images: int = IMAGES) -> list[Embedding]:
    """Dendrites and somas of the first layer, on `images` test images or all if they are fewer."""
    rng = np.random.default_rng(run.trial)
    count = len(data.y_test)
    chosen = torch.from_numpy(rng.permutation(count)[: min(images, count)])
    classes = data.y_test[chosen].numpy()
    training = model.training
    model.eval()
    stages = zip(("dendrites", "somas"), activities(model, data.x_test[chosen]), strict=False)
    embedded = [_embed(run, stage, active.numpy(), classes) for stage, active in stages]
    model.train(training)
    return embedded


def _embed(
    run: Run, stage: str, active: NDArray[np.float32], classes: NDArray[np.int64]
) -> Embedding:
    from sklearn.manifold import TSNE, trustworthiness
    from sklearn.metrics import silhouette_score
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    neighbours, perplexity = min(NEIGHBOURS, len(classes) // 3), min(30.0, len(classes) / 4)
    with threadpool_limits(1):  # more threads take ten times as long on a machine in use
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=run.trial)
        plane = tsne.fit_transform(active)
    return Embedding(
        run,
        stage,
        [(float(f"{x:.4g}"), float(f"{y:.4g}")) for x, y in plane],
        classes.tolist(),
        float(silhouette_score(plane, classes)),
        float(trustworthiness(active, plane, n_neighbors=neighbours)),
        neighbourhood(active, classes, neighbours),
    )


def neighbourhood(
    active: NDArray[np.float32], classes: NDArray[np.int64], neighbours: int = NEIGHBOURS
) -> float:
    """The part of each image's nearest activities that have its class; the image is left out."""
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=neighbours).fit(active).kneighbors(return_distance=False)
    return float((classes[near] == classes[:, None]).mean())


def embed_best(
    results: Sequence[Result], folder: Path, root: str | Path | None = None
) -> list[Path]:
    """Train the best network of each family again, first trial, and write their embeddings.

    Args:
        results: of any data sets; each is read from `root`, see `datasets.load`.
        folder: FILE is written there; `figures` reads it.
    """
    embeddings: list[Embedding] = []
    for name in sorted({result.run.data for result in results}):
        data = load(name, root)
        own = plain([result for result in results if result.run.data == name])
        for run in best(own, "accuracy").values():
            ((model, split, _),) = train([run], data, title=f"{name} {run.kind}")
            embeddings += embed(model, split, run)
    return [write(embeddings, folder)]


def write(embeddings: Sequence[Embedding], folder: Path) -> Path:
    path = folder / FILE
    write_json(path, {"embeddings": [asdict(embedding) for embedding in embeddings]})
    return path


def read(folder: Path) -> list[Embedding]:
    """What `embed_best` has written there; none if it has not."""
    path = folder / FILE
    if not path.exists():
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["embeddings"]
        return [Embedding(**{**row, "run": Run(**row["run"])}) for row in rows]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected what `analyse --embed` wrote in {path}, got: {error!r}"
        ) from error
