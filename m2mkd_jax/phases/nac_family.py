"""NAC students (read-in, mediators, read-out) and the Neural Attentive Circuit they make up.

Axes: U latents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import module_recipe, teaching_data
from m2mkd_jax.config.family_sections import SECTIONS
from m2mkd_jax.config.networks import nac_spec
from m2mkd_jax.errors import located, require
from m2mkd_jax.losses import graph
from m2mkd_jax.models import chain, registry
from m2mkd_jax.models.nac import kernels, priors
from m2mkd_jax.models.nac import students as nac_students
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.phases import families
from m2mkd_jax.phases.families import Network, Reduction, Student, StudentFamily
from m2mkd_jax.phases.phase import FRESH, Regulariser, StageSpec, WeightsFrom

KEPT = (0.75, 0.5, 0.25)  # shares of the mediators that are left


class NACFamily(StudentFamily):
    """Read-in, mediators, read-out; one Neural Attentive Circuit end to end."""

    section = "nac"
    defaults = staticmethod(SECTIONS["nac"])

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        self.modules = config.nac.iterations + 2
        self.parts = f"read-in, {config.nac.iterations} iterations, read-out"

    def check(self, teaching: bool, devices: int) -> None:
        """Raises UserError where config.nac does not fit the rest of the config."""
        del devices
        config, nac = self.config, self.config.nac
        nac_spec(config, config.data)
        if teaching:
            width = families.teacher(config).width
            require(
                nac.stitch_dim in (0, width),
                f"config.nac.stitch_dim is {nac.stitch_dim}; it must be the meta model's width "
                f"{width} (or 0 for just that)",
            )
        require(
            not (nac.share_propagators or nac.share_ffn)
            or not ("m2mkd" in config.phases or config.init.students),
            "config.nac: m2mKD teaches every propagator apart; switch share_propagators and "
            "share_ffn off or drop the m2mkd phase",
        )
        with located("config.nac.prior"):
            priors.build_graph(nac.prior, nac.mediator_latents, dict(nac.options), config.seed)
        for name in ("m2mkd", "e2e"):
            recipe = config.recipes[name]
            require(
                not (recipe.importance_weight or recipe.load_weight),
                f"config.recipes.{name}: importance_weight and load_weight are about routers; a "
                "NAC has none",
            )
        self._check_regulariser()

    def _check_regulariser(self) -> None:
        """Refuses a config.regulariser that the latents do not allow."""
        wanted, nac = self.config.regulariser, self.config.nac
        if wanted.kind == "stochastic_block":
            with located("config.regulariser"):
                graph.block_matrix(nac.mediator_latents, wanted.clusters, wanted.p_in, wanted.p_out)
        latents = nac.input_latents + nac.mediator_latents + nac.output_latents
        require(
            wanted.kind != "gaussian_mixture" or wanted.components <= math.comb(latents, 2),
            f"config.regulariser.components is {wanted.components}; {latents} latents have only "
            f"{math.comb(latents, 2)} distances",
        )

    def student(self, index: int) -> Student:
        """Read-in (0), a mediator, or read-out (the last)."""
        config = self.config
        recipe = module_recipe(config, "m2mkd", index)
        spec, width = nac_spec(config, teaching_data(config)), families.teacher(config).width
        last, states = self.modules - 1, recipe.batch // recipe.accumulate
        kind = "read-in" if index == 0 else "read-out" if index == last else "mediator"
        # All mediators are built alike, and only they have a drop-path of their own.
        like = 1 if kind == "mediator" else index
        build = registry.nac_student_builder(spec, like, self.modules, width, states)
        describe = {
            "kind": "nac_student",
            "spec": dataclasses.asdict(spec),
            "module": index,
            "modules": self.modules,
            "stitch_dim": width,
            "states": states,
        }
        rates = (recipe.drop_path,) if kind == "mediator" and recipe.drop_path else None
        return Student(StageSpec(build, FRESH, f"NAC {kind} student"), rates, describe)

    def network(self, weights: WeightsFrom) -> Network:
        """One NAC: a chain of one stage."""
        config = self.config
        spec, recipe = nac_spec(config, config.data), module_recipe(config, "e2e")
        return Network(
            stages={"nac": StageSpec(registry.nac_builder(spec), weights, "NAC")},
            rates=((recipe.drop_path,) * spec.iterations,),
            describe={"kind": "nac", "spec": dataclasses.asdict(spec)},
            regulariser=self._regulariser if config.regulariser.kind != "none" else None,
            regulariser_fitted=config.regulariser.kind == "gaussian_mixture",
        )

    def _regulariser(self, stages: Mapping[str, nnx.Module]) -> Regulariser:
        """config.regulariser; the Gaussian mixture looks at the initial network."""
        wanted, mixture = self.config.regulariser, None
        if wanted.kind == "gaussian_mixture":
            mixture = graph.fit_gaussian_mixture(
                jax.device_get(all_distances(stages["nac"])), wanted.components, self.config.seed
            )
        value = graph_regulariser(wanted.kind, wanted, mixture)
        return lambda merged: value(merged["nac"])

    @property
    def head(self) -> tuple[str, tuple[str, ...]]:
        """The stage and the path of the layer that gives the logits. Raises UserError: none."""
        require(
            self.config.nac.output == "pooling",
            f'config.nac.output is "{self.config.nac.output}": only "pooling" has a head to train',
        )
        return "nac", ("pooling", "to_logits")

    def prepare(self, name: str, params: dict, seed: int) -> dict:
        """A fresh stage's parameters; the network's mediators get their graph."""
        nac = self.config.nac
        if name == "nac" and nac.prior != "none":
            params["mediator_latents"]["signatures"] = priors.prior_signatures(
                nac.prior, nac.mediator_latents, nac.signature_dim, dict(nac.options), seed
            )
        return params

    def reductions(
        self, network: Mapping[str, dict], seed: int, seen: Mapping[str, Any]
    ) -> Iterator[Reduction]:
        """Fewer mediators: those with the weakest links go first, and others drawn at random.

        The links of a mediator are summed over senders, receivers and iterations.
        """
        del seen
        config, tree = self.config, network["nac"]
        spec = nac_spec(config, config.data)
        nac = chain.merge(chain.abstract(registry.nac_builder(spec)).graph, *tree.values())
        signatures = nac.mediator_latents.signatures[...]
        log = kernels.log_kernel(
            kernels.distance(signatures, signatures)[None],
            nac.propagators.attention.bandwidth[...][:, None, None],
            spec.truncation,
            spec.truncation_implementation,
        )
        links = np.asarray(jnp.exp(log)).clip(0, 1).sum(0) * (1 - np.eye(len(signatures)))
        orders = {
            "mediators, weakest links first": np.argsort(-(links.sum(0) + links.sum(1))),
            "mediators, at random": np.random.default_rng(seed).permutation(len(signatures)),
        }
        for title, order in orders.items():
            for share in KEPT:
                count = max(round(share * len(order)), 1)
                smaller = dataclasses.replace(spec, mediator_latents=count)
                params = without_mediators(
                    tree["params"], np.sort(order[:count]), spec.codes_per_iteration
                )
                stage = StageSpec(registry.nac_builder(smaller), FRESH, "NAC")
                trees = {"nac": {**tree, "params": params}}
                yield Reduction(title, count, {"nac": stage}, trees)

    def assemble(
        self, network: Mapping[str, dict], taught: Sequence[dict]
    ) -> tuple[dict[str, dict], dict[str, str]]:
        """The students' parameters put into the network's, and where each part came from."""
        params, origin = nac_students.assemble(network["nac"], list(taught))
        return {"nac": params}, {f"nac/{part}": where for part, where in origin.items()}


def without_mediators(params: Mapping[str, Any], kept: np.ndarray, per_iteration: bool) -> dict:
    """A NAC's parameters with some of its mediators alone.

    Args:
        params: of the NAC.
        kept: int (U',), which mediators.
        per_iteration: whether mediators have codes for every iteration.
    """
    latents = dict(params["mediator_latents"])
    for name, value in latents.items():
        latents[name] = value[:, kept] if name == "codes" and per_iteration else value[kept]
    return {**params, "mediator_latents": latents}


def graph_regulariser(
    kind: str, options: Any, mixture: graph.Mixture | None = None
) -> Callable[[NAC], jax.Array]:
    """A NAC's graph regulariser, weighted.

    Source: docs/reference.md#nac-regularisers.

    Args:
        kind: 'hinge' (all latents repel below a distance), 'stochastic_block' (the mediators'
            kernels keep block structure) or 'gaussian_mixture' (distances keep their distribution).
        options: weight, and hinge | clusters, p_in, p_out | components.
        mixture: the fitted mixture of `losses.graph.fit_gaussian_mixture`.
    """

    def value(nac: NAC) -> jax.Array:
        if kind == "stochastic_block":
            signatures = nac.mediator_latents.signatures[...]
            target = graph.block_matrix(
                signatures.shape[0], options.clusters, options.p_in, options.p_out
            )
            distance = kernels.distance(signatures, signatures)
            spec = nac.spec
            affinities = jax.vmap(
                lambda bandwidth: kernels.affinity(
                    distance, bandwidth, spec.truncation, spec.truncation_implementation
                )
            )(nac.propagators.attention.bandwidth[...])
            return graph.stochastic_block(affinities, target)
        distance = all_distances(nac)
        if kind == "hinge":
            return graph.hinge_repulsion(distance, options.hinge)
        assert mixture is not None  # fitted by whoever asks for this kind
        return graph.gaussian_mixture(distance, mixture)

    return lambda nac: options.weight * value(nac)


def all_distances(nac: NAC) -> jax.Array:
    """Distances (U, U) between the signatures of all latents: input, mediator, output."""
    groups = (nac.input_latents, nac.mediator_latents, nac.output_latents)
    signatures = jnp.concatenate([group.signatures[...] for group in groups])
    return kernels.distance(signatures, signatures)
