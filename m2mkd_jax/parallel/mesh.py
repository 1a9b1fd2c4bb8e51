"""The device mesh and the sharding of a batch.

Axes: 'data' (D groups) and 'expert' (E devices per group, over which expert layers are sharded).
The batch (B) is sharded over both: every device has its own images whatever E is, and a process's
share of the batch is always B / processes, which sharding over 'data' alone would not give when a
group spans processes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from m2mkd_jax.errors import UserError
from m2mkd_jax.parallel.process import alone, wait_for_all

AXES = ("data", "expert")
REMAINING = -1


def mesh_shape(devices: int, data: int = REMAINING, expert: int = 1) -> tuple[int, int]:
    """The shape (D, E) of the mesh, D * E = devices.

    Args:
        devices: number of devices.
        data: D; -1 means the remaining devices.
        expert: E; -1 means the remaining devices. Only one of the two may be -1.

    Raises:
        UserError: there is no such shape.
    """
    asked = f"config.mesh: data {data} x expert {expert}"
    if any(size < 1 and size != REMAINING for size in (data, expert)):
        raise UserError(
            f"{asked} is not a valid mesh shape; give numbers, or -1 for the remaining devices"
        )
    if data == expert == REMAINING:
        raise UserError(f"{asked}: only one of them can be -1")
    known = expert if data == REMAINING else data
    if REMAINING in (data, expert):
        if devices % known:
            fitting = [n for n in range(1, devices + 1) if devices % n == 0]
            raise UserError(
                f"{asked}: {known} does not divide {devices} device(s); use one of {fitting}"
            )
        return (devices // known, known) if data == REMAINING else (known, devices // known)
    if data * expert != devices:
        raise UserError(
            f"{asked} is {data * expert} device(s), but there are {devices};"
            " -1 means the remaining devices"
        )
    return data, expert


def make_mesh(
    devices: Sequence[jax.Device] | None = None, data: int = REMAINING, expert: int = 1
) -> Mesh:
    """The mesh ('data', 'expert') of some devices.

    The devices are ordered by process, so a group lies within one process if `expert` divides a
    process's devices (tokens are exchanged within groups, which is slow between processes), and a
    process's images are consecutive in the batch.

    Args:
        devices: the devices to use; by default all, of all processes.
        data: number of groups; -1 means the remaining devices.
        expert: devices per group; -1 means the remaining devices.

    Raises:
        UserError: there is no such shape.
    """
    devices = in_line(jax.devices() if devices is None else devices)
    shape = mesh_shape(len(devices), data, expert)
    # Auto: with_sharding_constraint asserts on Explicit axes instead of constraining.
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 2)


def warm_up_collectives(mesh: Mesh) -> None:
    """Runs one collective per mesh axis, so that communicators form while processes are in step.

    On CPUs a communicator forms at its first collective, and fails if one process is half a minute
    behind another, which can happen at the first training step, after minutes of compiling.
    """
    if alone():
        return

    def sums(x: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(x, axes) for axes in (*AXES, AXES)]

    x = jax.device_put(np.ones(()), replicated(mesh))
    spec = PartitionSpec()
    program = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=spec, out_specs=spec))
    compiled = program.lower(x).compile()
    wait_for_all("warm_up_collectives")
    jax.block_until_ready(compiled(x))


def in_line(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """The devices ordered by process."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def spanning_groups(mesh: Mesh) -> int:
    """The largest number of processes in a group; above 1, tokens cross the network."""
    return max(len({device.process_index for device in group}) for group in mesh.devices)


def with_mesh(mesh: Mesh | AbstractMesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced so that layers find the mesh by `jax.sharding.get_abstract_mesh()`.

    The mesh is set only during tracing: `jax.set_mesh` around a run would also place every small
    array created meanwhile on all devices and processes.
    """

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis (images) sharded over all devices of the mesh, the others not."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Turns this process's host arrays into global arrays, sharded by `batch_sharding`.

    Args:
        mesh: from `make_mesh`.
        batch: name -> (B / processes, ...), this process's share of the global batch; the shares
            follow the order of the mesh's devices.

    Returns:
        name -> (B, ...).

    Raises:
        UserError: the share is not divisible by the number of this process's devices.
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
