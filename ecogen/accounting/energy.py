"""The bill of one usage: seconds and bytes times the constants.

Legend: E energy in J, t seconds, TE embodied emissions of a whole device.
"""

from __future__ import annotations

from collections.abc import Iterable

from ecogen.accounting.bill import Bill, Bounds
from ecogen.accounting.constants import Constants
from ecogen.accounting.intensity import intensity
from ecogen.records import LinkClass, Usage
from ecogen.topology import Node, Site
from ecogen.units import GB, kwh


def bill(
    usage: Usage, sent: Iterable[tuple[LinkClass | None, int]], node: Node, site: Site, constants: Constants
) -> Bill:
    """What one usage of a node at its site cost.

    Args:
        sent: link class and bytes, framing included, of what the node sent; the sender pays for the whole way.

    Raises:
        ConfigError: if the site's zone has no carbon intensity.
    """
    cpu_j = cpu_energy(usage.cpu_s, node.device.busy_w, constants)
    idle_j = idle_energy(usage.wall_s - usage.cpu_s, node.device.idle_w, constants)
    memory_j = constants.memory_w_per_gb * (usage.memory_bytes / GB * usage.wall_s)
    network_j = network_energy(sent, constants)
    own_j = cpu_j + idle_j + memory_j
    # Not on the network: its averages already hold the operators' overhead, and the equipment is elsewhere.
    overhead_j = own_j * (site.pue - 1)
    grid = intensity(site.zone, constants.intensities)
    operational_g = operational_emissions(own_j + overhead_j + network_j, grid.g_per_kwh)
    embodied_g = embodied_emissions(usage.wall_s, node, constants)
    return Bill(cpu_j, idle_j, memory_j, network_j, overhead_j, operational_g, embodied_g)


def cpu_energy(cpu_s: float, busy_w: float, constants: Constants) -> Bounds:
    """E = t_cpu x P_busy. P_busy holds the thread's idle power too, so only idle time is billed beside it."""
    return constants.busy_factor * (cpu_s * busy_w)


def idle_energy(idle_s: float, idle_w: float, constants: Constants) -> Bounds:
    """E = max(0, t_wall - t_cpu) x P_idle of the one reserved thread; a node on several threads is never idle."""
    return constants.idle_factor * (max(0.0, idle_s) * idle_w)


def network_energy(sent: Iterable[tuple[LinkClass | None, int]], constants: Constants) -> Bounds:
    """E = sum over links of bytes x J/byte; what goes over no link of the topology costs nothing."""
    lines = (constants.network_j_per_gb[link] * (count / GB) for link, count in sent if link is not None)
    return sum(lines, Bounds.zero())


def operational_emissions(energy_j: Bounds, g_per_kwh: float) -> Bounds:
    """O = E x I (SCI specification), PUE being in E already."""
    return energy_j * (kwh(1) * g_per_kwh)


def embodied_emissions(reserved_s: float, node: Node, constants: Constants) -> Bounds:
    """M = TE x time reserved / lifetime x share reserved (SCI specification)."""
    made = constants.embodied[node.tier]
    return made.total_g * (reserved_s / made.lifetime_s * made.share)
