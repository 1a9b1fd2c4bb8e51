"""The device mesh and where a batch lies on it.

Axes: 'data' (D groups) and 'expert' (E devices per group, over which expert layers are cut).  The
batch is cut over both, D * E parts: every device has its own images whatever E is, and a process's
share of the batch is always B / processes (cut over 'data' alone it is not, where a group spans
processes).
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from m2mkd_jax.errors import UserError


def make_mesh(devices: Sequence[jax.Device] | None = None, expert: int = 1) -> Mesh:
    """A mesh (devices / expert, expert) named ('data', 'expert').

    Args:
      devices: the devices to use; all of them, over all processes, by default.
      expert: devices per group.

    Raises:
      UserError: `expert` does not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if expert < 1 or len(devices) % expert:
        raise UserError(
            f"an expert axis of {expert} does not divide {len(devices)} device(s); "
            f"choose one of {[n for n in range(1, len(devices) + 1) if len(devices) % n == 0]}"
        )
    # Auto: make_mesh defaults to Explicit, where with_sharding_constraint asserts, not constrains.
    return jax.make_mesh(
        (len(devices) // expert, expert),
        ("data", "expert"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis (images) cut over all devices of the mesh, the others whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "expert")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's host arrays as global arrays, cut over the mesh by `batch_sharding`.

    Args:
      mesh: from `make_mesh`.
      batch: name -> (B / processes, ...): every process gives its own, equally large share, and the
        shares lie one after the other in the order of the mesh's devices.

    Returns:
      name -> (B, ...).

    Raises:
      UserError: the share cannot be cut equally over this process's devices.
    """
    sharding = batch_sharding(mesh)
    local = len(mesh.local_devices)
    for name, array in batch.items():
        if np.ndim(array) == 0 or len(array) % local:
            raise UserError(
                f"batch entry {name!r} of shape {np.shape(array)} cannot be cut over {local} "
                f"device(s); make the batch size a multiple of {mesh.size}"
            )
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
