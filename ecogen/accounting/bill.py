"""Bounds and bills: what a piece of work cost, line by line, as low, middle and high figures."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ecogen.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Bounds:
    """A modelled quantity: the figure we report, and the range it was modelled to be in.

    Raises:
        ConfigError: if low, mid and high do not rise.
    """

    low: float
    mid: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.mid <= self.high:
            raise ConfigError([f"{self.low}, {self.mid}, {self.high} do not rise; give low <= mid <= high"], "bounds")

    def __add__(self, other: Bounds) -> Bounds:
        return Bounds(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def __mul__(self, factor: float) -> Bounds:
        """Scaled by a number that is not negative."""
        return Bounds(self.low * factor, self.mid * factor, self.high * factor)

    __rmul__ = __mul__

    @classmethod
    def zero(cls) -> Bounds:
        return cls(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Bill:
    """Joules and grams of CO2e of a piece of work, by cause.

    Attributes:
        cpu_j: while a thread computed.
        idle_j: while its reserved thread waited.
        memory_j: of the memory it held.
        network_j: of what it sent, at both ends and between.
        overhead_j: cooling and power supply of its site, (PUE - 1) x the three lines of the node.
        operational_g: of all that energy, at the carbon intensity of the node's zone.
        embodied_g: the reserved share of making the hardware.
    """

    cpu_j: Bounds
    idle_j: Bounds
    memory_j: Bounds
    network_j: Bounds
    overhead_j: Bounds
    operational_g: Bounds
    embodied_g: Bounds

    @property
    def energy_j(self) -> Bounds:
        """The sum of all five lines."""
        return self.cpu_j + self.idle_j + self.memory_j + self.network_j + self.overhead_j

    @property
    def emissions_g(self) -> Bounds:
        """Operational and embodied."""
        return self.operational_g + self.embodied_g

    def __add__(self, other: Bill) -> Bill:
        return Bill(*(getattr(self, line.name) + getattr(other, line.name) for line in fields(self)))

    @classmethod
    def zero(cls) -> Bill:
        return cls(*(Bounds.zero() for _ in fields(cls)))
