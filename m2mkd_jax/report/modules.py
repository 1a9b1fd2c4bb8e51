"""How well each student took over from its teacher, and what the parts of the network do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx
import numpy as np

from m2mkd_jax.report.analysis import Analysis
from m2mkd_jax.report.charts import COLOURS, INK, SHAPES, Figure, draw, legend_below
from m2mkd_jax.report.heat import heat_map, overlay_tag
from m2mkd_jax.report.records import RunRecord
from m2mkd_jax.report.tables import table

DRAWN = 128  # mediators of a graph that is drawn
LINK = 0.5  # probability from which on a link is drawn
USE_CLASSES, USE_MEDIATORS = 30, 64  # of the heat map of what the read-out reads


def health(run: RunRecord, found: Analysis) -> list[str | Figure]:
    """Students beside their teachers, module by module; [] before the first has finished."""
    measured: Mapping[str, Mapping[str, Any]] = found.numbers.get("modules", {})
    jobs = [j for j in run.of_phase("m2mkd") if j.accuracy is not None]
    if not jobs:
        return []
    rows, split = [], found.numbers.get("modules_split", "test")
    for job in jobs:
        own, accuracy = measured.get(str(job.index), {}), job.accuracy or 0.0
        stitches = ", ".join(f"{n} {v:.3g}" for n, v in own.get("stitches", {}).items())
        gap = None if job.reference is None else accuracy - job.reference
        rows.append(
            [
                job.index,
                accuracy,
                job.reference,
                gap,
                own.get("agreement"),
                own.get("cka"),
                stitches or None,
            ]
        )
    listed = table(
        ("module", "student", "teacher", "gap", "agreement", "linear CKA", "stitch norms"),
        rows,
        "Health of the modules. Accuracy of the meta model with its module i replaced by student "
        "i, and by teacher module i, on all images that training looks at; agreement is the share "
        f"of the analysis's {split} images that both put into the same class; linear CKA compares "
        "the outputs of student and teacher module for these (tokens averaged; 1: equal up to a "
        "rotation and a factor; too high with fewer images than channels: raise --images); norms "
        "are of the stitches' kernels. A "
        "module far below its teacher needs more epochs (recipes.m2mkd.modules) before the network "
        "is assembled.",
    )
    return [_hybrids(jobs, measured), listed]


def _hybrids(jobs: list[Any], measured: Mapping[str, Mapping[str, Any]]) -> Figure:
    indices = [job.index for job in jobs]

    def plot(axes: Any) -> None:
        lines = {
            "student": [job.accuracy for job in jobs],
            "teacher": [job.reference for job in jobs],
            "agreement": [measured.get(str(i), {}).get("agreement") for i in indices],
            "linear CKA": [measured.get(str(i), {}).get("cka") for i in indices],
        }
        for number, (name, values) in enumerate(lines.items()):
            known = [(i, v) for i, v in zip(indices, values, strict=True) if v is not None]
            if known:
                axes.plot(
                    *zip(*known, strict=True), SHAPES[number], label=name, color=COLOURS[number]
                )
        axes.set_xticks(indices)
        axes.set_xlabel("module")
        axes.set_ylabel("share")
        legend_below(axes, 4)

    spoken = "; ".join(
        f"module {j.index} student {j.accuracy:.3f}"
        + ("" if j.reference is None else f", teacher {j.reference:.3f}")
        for j in jobs
    )
    return draw(
        "Each module swapped into the meta model",
        "Accuracy with the student in place of module i, with the teacher module there, how often "
        "the two agree, and how alike their outputs are (linear CKA).",
        f"{spoken}.",
        plot,
    )


def circuit(found: Analysis) -> list[str | Figure]:
    """Figures of a NAC; [] for other networks."""
    arrays = {n[4:]: a for n, a in found.arrays.items() if n.startswith("nac/")}
    if "links" not in arrays:
        return []
    stages = [("after training", arrays["links"], arrays["signatures"])]
    if "initial_links" in arrays:
        first = ("before", arrays["initial_links"], arrays["initial_signatures"])
        stages.insert(0, first)
    return [
        _graph(stages),
        _attention(arrays["read_in_images"], arrays["read_in"]),
        _use(arrays["use"], arrays["signatures"].shape[0], found.numbers["class_names"]),
        _groups(arrays),
    ]


def _graph(stages: list[tuple[str, np.ndarray, np.ndarray]]) -> Figure:
    """Links between mediators, as graphs of few mediators, else as matrices."""
    matrices = []
    for title, links, signatures in stages:
        mediators = len(signatures)
        between = np.asarray(links, np.float32)[..., -mediators:].mean(0)
        matrices.append((title, (between + between.T) / 2))
    few = len(matrices[0][1]) <= DRAWN
    counts = [int((np.triu(m, 1) > 0).sum()) for _, m in matrices]

    def plot(panels: Any) -> None:
        places = _layout(matrices[-1][1]) if few else None
        shown = zip(np.atleast_1d(panels).flat, matrices, counts, strict=True)
        for axes, (title, matrix), count in shown:
            axes.set_title(f"{title}: {count} links")
            if places is None:
                heat_map(axes, matrix)
                continue
            for i, j in zip(*np.nonzero(np.triu(matrix, 1)), strict=True):
                strength = min(float(matrix[i, j]) / LINK, 1.0)
                axes.plot(*places[[i, j]].T, color=COLOURS[0], alpha=strength, linewidth=1.2)
            axes.scatter(*places.T, s=26, color=INK, zorder=3)
            axes.set_axis_off()

    spoken = ", ".join(f"{n} {title}" for (title, _), n in zip(matrices, counts, strict=True))
    how = (
        "Points are mediators, at the same places in both; lines are links that are not cut, the "
        f"stronger the likelier (full colour from a probability of {LINK} on)."
        if few
        else "Row and column are mediators; the deeper, the likelier the link."
    )
    return draw(
        "Signature graph of the mediators",
        f"{how} Probabilities are exp(-distance / bandwidth) of two signatures, averaged over the "
        "iterations and both directions. 'before' is the start of end-to-end training.",
        f"Links between mediators that are not cut: {spoken}.",
        plot,
        size=(3.3 * len(matrices), 3.1),
        panels=(1, len(matrices)),
        wide=len(matrices) > 1,
    )


def _layout(matrix: np.ndarray) -> np.ndarray:
    """Places of nodes (M, 2), near each other where the link is likely."""
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(matrix)))
    for i, j in zip(*np.nonzero(np.triu(matrix, 1)), strict=True):
        graph.add_edge(int(i), int(j), weight=float(matrix[i, j]))
    places = networkx.spring_layout(graph, seed=0, iterations=100)
    return np.array([places[i] for i in range(len(matrix))])


def _groups(arrays: Mapping[str, np.ndarray]) -> str:
    """Link probabilities by group of sender and receiver."""
    mediators = len(arrays["signatures"])
    rows = []
    for title, prefix in (("before", "initial_"), ("after", "")):
        if f"{prefix}links" not in arrays:
            continue
        links = np.asarray(arrays[f"{prefix}links"], np.float32)
        out = np.asarray(arrays[f"{prefix}output_links"], np.float32)
        inside, between = ~np.eye(mediators, dtype=bool), links[..., -mediators:]
        edges = arrays["prior"] > 0
        groups = {
            "input to mediator": links[..., :-mediators].ravel(),
            "mediator to mediator": between[:, inside].ravel(),
            "of these, edges of the prior": between[:, edges].ravel(),
            "of these, no edges of it": between[:, inside & ~edges].ravel(),
            "input to output": out[:, :-mediators].ravel(),
            "mediator to output": out[:, -mediators:].ravel(),
        }
        for name, values in groups.items():
            if values.size:
                shares = [float((values > LINK).mean()), float((values == 0).mean())]
                rows.append([name, title, float(values.mean()), float(values.max()), *shares])
    return table(
        ("links", "when", "mean", "largest", f"above {LINK}", "cut"),
        rows,
        "Link probabilities by group. 'cut' is the share of links beyond config.nac.truncation, "
        "which carry nothing; links to the output latents are never cut. A mediator's link to "
        "itself is left out. The prior is the graph that the signatures were fitted to.",
    )


def _attention(images: np.ndarray, weights: np.ndarray) -> Figure:
    """Read-in attention over sample images: (n, U, T) for images (n, H, W, 3)."""
    side = round(weights.shape[-1] ** 0.5)
    maps = np.asarray(weights, np.float32).reshape(*weights.shape[:2], side, -1)
    rows = []
    for number, (image, own) in enumerate(zip(images, maps, strict=True)):
        strongest = np.argsort(-own.max((1, 2)), kind="stable")[:3]
        tags = overlay_tag(image, None, f"test image {number}") + overlay_tag(
            image, own.mean(0), f"test image {number}, mean attention of all input latents"
        )
        for latent in strongest:
            tags += overlay_tag(
                image, own[latent], f"test image {number}, attention of input latent {latent}"
            )
        rows.append(f'<div class="samples">{tags}</div>')
    return Figure(
        "Read-in attention",
        f'<div class="rows">{"".join(rows)}</div>',
        "A row an image: itself, where all input latents look on average, and the three most "
        "concentrated latents. Bright: read; dark: not read. Heads are averaged.",
        wide=True,
    )


def _use(use: np.ndarray, mediators: int, names: list[str]) -> Figure:
    """What the read-out reads of each mediator, by class."""
    shares = use[:, -mediators:]
    present = [i for i in range(len(names)) if use[i].any()]
    mean = shares[present].mean(0)
    order = np.argsort(-mean, kind="stable")
    most = mean[order[: max(mediators // 4, 1)]].sum() / max(mean.sum(), 1e-9)
    shown, order = present[:USE_CLASSES], order[:USE_MEDIATORS]
    scaled = shares[shown][:, order]
    scaled = scaled / max(float(scaled.max()), 1e-9)

    def plot(axes: Any) -> None:
        heat_map(axes, scaled, [names[i] for i in shown])
        axes.set_xlabel("mediator, most used first")

    cut = [
        f"the first {len(shown)} of {len(present)} classes" if len(shown) < len(present) else "",
        f"the {len(order)} most used of {mediators} mediators" if len(order) < mediators else "",
    ]
    only = " and ".join(part for part in cut if part)
    return draw(
        "Mediators that the read-out listens to, by class",
        "Share of the output latents' attention that goes to each mediator, averaged over the "
        "images of a class (row). Rows that differ: classes are told apart by which mediators "
        "speak; rows that are alike: by what they say." + (f" Shown: {only}." if only else ""),
        f"Read-out attention by class and mediator; the most used quarter gets {100 * most:.0f}% "
        "of what mediators get.",
        plot,
        size=(4.4, 3.4),
    )


def experts(found: Analysis) -> list[str | Figure]:
    """Where a V-MoE sends the tokens of each class; [] for other networks."""
    loads = found.arrays.get("vmoe/class_load")
    if loads is None:
        return []
    names = [found.numbers["class_names"][i] for i in found.arrays["vmoe/classes"]]
    layers, count = loads.shape[1:]
    columns = min(layers, 4)
    rows = -(-layers // columns)

    def plot(panels: Any) -> None:
        flat = list(np.atleast_1d(panels).flat)
        for layer, axes in enumerate(flat[:layers]):
            own = loads[:, layer]
            heat_map(axes, own / max(float(own.max()), 1e-9), names if layer % columns == 0 else ())
            axes.set_title(f"layer {layer}")
        for axes in flat[layers:]:
            axes.set_axis_off()

    spread = [float(loads[:, layer].std(0).mean()) for layer in range(layers)]
    return [
        draw(
            "Which classes go to which experts",
            "A row a class, a column an expert; the deeper, the larger the share of the class's "
            "tokens that go there. Equal rows: the router does not look at the class.",
            f"Shares of {len(names)} classes over {count} experts; the layer that tells classes "
            f"apart most is layer {int(np.argmax(spread))}.",
            plot,
            size=(max(2.4 * columns, 4.4), 2.8 * rows),
            panels=(rows, columns),
            wide=columns > 1,
        )
    ]
