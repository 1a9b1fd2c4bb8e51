"""The device mesh and where a batch lies on it.

Axes: 'data' (D groups) and 'expert' (E devices per group, over which expert layers are cut).  The
batch is cut over both, D * E parts: every device has its own images whatever E is, and a process's
share of the batch is always B / processes (cut over 'data' alone it is not, where a group spans
processes).
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from m2mkd_jax.errors import UserError
from m2mkd_jax.parallel.process import alone, wait_for_all

AXES = ("data", "expert")
REST = -1


def mesh_shape(devices: int, data: int = REST, expert: int = 1) -> tuple[int, int]:
    """(D, E) with D * E = devices; one of the two may be -1, the rest.

    Raises:
      UserError: there is no such shape.
    """
    asked = f"config.mesh: data {data} x expert {expert}"
    if any(size < 1 and size != REST for size in (data, expert)):
        raise UserError(f"{asked} is no mesh; give numbers of devices, or -1 for the rest")
    if data == expert == REST:
        raise UserError(f"{asked}: only one of them can be the rest")
    known = expert if data == REST else data
    if REST in (data, expert):
        if devices % known:
            fitting = [n for n in range(1, devices + 1) if devices % n == 0]
            raise UserError(
                f"{asked}: {known} does not divide {devices} device(s); use one of {fitting}"
            )
        return (devices // known, known) if data == REST else (known, devices // known)
    if data * expert != devices:
        raise UserError(
            f"{asked} is {data * expert} device(s), but there are {devices}; -1 means the rest"
        )
    return data, expert


def make_mesh(
    devices: Sequence[jax.Device] | None = None, data: int = REST, expert: int = 1
) -> Mesh:
    """The mesh ('data', 'expert') of these devices.

    They are lined up process by process, groups one after the other: a group lies within one
    process wherever `expert` divides a process's devices (tokens are exchanged within groups, and
    between processes that is slow), and a process's images are consecutive ones of the batch.

    Args:
      devices: the devices to use; all of them, over all processes, by default.
      data: groups; -1: the rest.
      expert: devices per group; -1: the rest.

    Raises:
      UserError: no such shape.
    """
    devices = in_line(jax.devices() if devices is None else devices)
    shape = mesh_shape(len(devices), data, expert)
    # Auto: with_sharding_constraint asserts on Explicit axes instead of constraining.
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 2)


def warm_up_collectives(mesh: Mesh) -> None:
    """Lets every group of devices that will exchange something do so once, all processes together.

    On CPUs such a group comes to be at its first exchange, and fails where one process is half a
    minute later than another: by the first training step, after minutes of compiling, they can be.
    """
    if alone():
        return

    def sums(x):
        return [jax.lax.psum(x, axes) for axes in (*AXES, AXES)]

    x = jax.device_put(np.ones(()), replicated(mesh))
    whole = PartitionSpec()
    program = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=whole, out_specs=whole))
    program = program.lower(x).compile()
    wait_for_all("meet")
    jax.block_until_ready(program(x))


def in_line(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Process by process."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def spanning_groups(mesh: Mesh) -> int:
    """How many processes the widest group lies in; above 1, tokens cross the network."""
    return max(len({device.process_index for device in group}) for group in mesh.devices)


def with_mesh(mesh: Mesh | AbstractMesh, function: Callable) -> Callable:
    """`function`, traced where layers find the mesh by `jax.sharding.get_abstract_mesh()`.

    Set while tracing alone: `jax.set_mesh` around a run would also spread every small array that
    is made beside it over all devices and processes.
    """

    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis (images) cut over all devices of the mesh, the others whole."""
    return NamedSharding(mesh, PartitionSpec(AXES))


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
