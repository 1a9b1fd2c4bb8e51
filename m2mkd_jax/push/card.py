"""The model card of pushed weights: YAML for the hub, then text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

import m2mkd_jax
from m2mkd_jax.push.training_record import TrainingRecord

KINDS = {
    "vit": "a vision transformer",
    "vmoe": "a sparse mixture-of-experts vision transformer (V-MoE)",
    "nac": "a Neural Attentive Circuit (NAC)",
    "nac_student": "a student module of a Neural Attentive Circuit",
}
# Titles of a run's results (jobs/summary.py).
RESULTS = {
    "meta": "meta model",
    "teacher": "teacher, fine-tuned",
    "e2e": "students taught by m2mKD, then trained end to end",
    "e2e_scratch": "the same network from scratch",
    "e2e_kd": "the same network, logits of the whole teacher",
    "e2e_upcycled": "the same network, experts from the teacher's MLPs",
    "e2e_minus_scratch": "m2mKD minus scratch, paired by seed",
}
TEACHING = ("pt", "mt", "ft", "m2mkd")  # phases on config.teaching_data, where it is given
METRICS = {
    "eval_accuracy": "accuracy",
    "eval_top5": "top-5 accuracy",
    "eval_loss": "negative log-likelihood",
    "eval_brier": "Brier score",
    "eval_ece": "calibration error",
    "eval_images": "images",
}
SHOWN_FIELDS = ("epochs", "batch", "optimizer", "lr", "schedule", "weight_decay", "drop_path")


def model_card(
    repository: str,
    license_name: str,
    description: Mapping[str, Any],
    parameters: Mapping[str, int],
    record: TrainingRecord,
) -> str:
    """The text of README.md.

    Args:
        repository: OWNER/NAME.
        license_name: its identifier; "": not stated.
        description: of the weights.
        parameters: of every tree, by name.
        record: of the run.
    """
    parts = [
        f"---\n{yaml.safe_dump(_metadata(license_name, description, record), sort_keys=False)}---",
        f"# {repository.partition('/')[2]}",
        _what(description, parameters),
        "## Load it\n\n" + _loading(repository, description),
        "## How it was trained\n\n" + "\n".join(_training(description, record)),
        "## What was measured\n\n" + "\n".join(_measured(description, record)),
        "## Licence\n\n" + (license_name or "Not stated by who pushed these weights."),
        f"Written by `python -m m2mkd_jax.push`, version {m2mkd_jax.__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(
    license_name: str, description: Mapping[str, Any], record: TrainingRecord
) -> dict[str, Any]:
    """What the hub reads."""
    known: dict[str, Any] = {"license": license_name} if license_name else {}
    known |= {"library_name": "m2mkd_jax", "tags": ["jax", "m2mkd", description["kind"]]}
    spec = description.get("spec", {})
    if spec.get("vit", spec).get("classes", 1) > 1:
        known["pipeline_tag"] = "image-classification"
    name = record.config.get("data", {}).get("name")
    if name and name != "image_folder":
        known["tags"].append(name)
    return known


def _what(description: Mapping[str, Any], parameters: Mapping[str, int]) -> str:
    kind = KINDS.get(description["kind"], f'a network of the kind "{description["kind"]}"')
    lines = [
        f"This is {kind} with {sum(parameters.values()):,} parameters, for "
        "[m2mkd_jax](https://arxiv.org/abs/2402.16918): module-to-module knowledge distillation.",
        "",
        "| stage | parameters |",
        "|---|---|",
        *(f"| {name} | {count:,} |" for name, count in parameters.items()),
    ]
    names = description.get("class_names", ())
    if names:
        shown = ", ".join(map(str, names[:20]))
        more = f", and {len(names) - 20} more (config.json)" if len(names) > 20 else ""
        lines += ["", f"Classes, in the order of the logits: {shown}{more}."]
    return "\n".join(lines)


def _loading(repository: str, description: Mapping[str, Any]) -> str:
    normalisation = description.get("normalisation", {})
    mean, std = normalisation.get("mean"), normalisation.get("std")
    return (
        "```python\n"
        "import m2mkd_jax\n\n"
        f'model = m2mkd_jax.load("hf://{repository}")\n'
        "logits = model((pixels / 255 - model.mean) / model.std)  # pixels: (B, H, W, 3)\n"
        "```\n\n"
        f"Pixels of 0 to 1 are normalised with mean {mean} and standard deviation {std}. "
        f"`python -m m2mkd_jax.predict hf://{repository} IMAGE...` prints the likeliest classes."
    )


def _training(description: Mapping[str, Any], record: TrainingRecord) -> Iterator[str]:
    """How the weights came about."""
    config, job = record.config, description.get("job", "")
    source = description.get("conversion", {}).get("source", "")
    if source:
        yield f"Converted from `{source.rpartition('/')[2]}`."
    if not job:
        yield "" if source else "Not recorded: these weights were not trained in a run."
        return
    yield f"Job `{job}` of a run, step {description.get('step', '?')}."
    if not config:
        yield "The run's directory was not beside the weights: its config is not recorded."
        return
    data = config["data"]
    yield (
        f"Data: `{data['name']}`, {data['classes']} classes, {data['image_size']} x "
        f"{data['image_size']} pixels. Phases: {', '.join(config['phases'])}. "
        f"Seed {config['seed']}."
    )
    yield ""
    yield f"| phase | {' | '.join(SHOWN_FIELDS)} |"
    yield "|---" * (len(SHOWN_FIELDS) + 1) + "|"
    recipes = config["recipes"]
    for phase in dict.fromkeys(p if p in recipes else "e2e" for p in config["phases"]):
        if phase in recipes:
            yield f"| {phase} | {' | '.join(str(recipes[phase].get(f)) for f in SHOWN_FIELDS)} |"


def _measured(description: Mapping[str, Any], record: TrainingRecord) -> Iterator[str]:
    """Metrics of these weights, and the run's results with intervals."""
    metrics = {k: v for k, v in description.get("metrics", {}).items() if k in METRICS}
    results = {k: v for k, v in record.results.items() if k in RESULTS}
    if not metrics and not results:
        yield "Nothing is recorded."
        return
    if metrics:
        yield f"| of these weights, {_images_of(description, record)} | |"
        yield "|---|---|"
        for name, value in metrics.items():
            yield f"| {METRICS[name]} | {value:.4g} |"
    if results:
        yield ""
        if record.accuracy_of:
            yield f"Accuracies in the run are of {record.accuracy_of}."
            yield ""
        yield "| accuracy in the run | mean | 95% interval (Student) | seeds |"
        yield "|---|---|---|---|"
        for name, value in results.items():
            yield _result(RESULTS[name], value)


def _images_of(description: Mapping[str, Any], record: TrainingRecord) -> str:
    """Of which images the metrics of weights are: those that the job has looked at in training."""
    config, phase = record.config, str(description.get("job", "")).partition("/")[0]
    if not config:
        return "at the end of their training" if phase else "as recorded"
    data = config.get("data", {})
    if phase in TEACHING and config.get("teaching_data", {}).get("name"):
        data = config["teaching_data"]
    return "on held-out validation images" if data.get("validation") else "on the test split"


def _result(title: str, value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"| {title} | {value:.4f} | | 1 |"
    half = value["interval95"]
    shown = "" if half is None else f"+- {half:.4f}"
    return f"| {title} | {value['mean']:.4f} | {shown} | {len(value['values'])} |"
