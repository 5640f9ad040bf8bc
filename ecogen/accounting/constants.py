"""The constants behind every joule and gram, each as bounds with its source; a caller may give others.

`[check]` marks a figure quoted from its publication from memory. `docs/formulas.md` has the same table in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ecogen.accounting.bill import Bounds
from ecogen.accounting.intensity import INTENSITIES, Intensity
from ecogen.records import LinkClass
from ecogen.topology import Tier
from ecogen.units import JOULES_PER_KWH

YEAR_S = 365.25 * 24 * 3600

MARGINAL_J_PER_GB = 240.0  # 0.03 W per Mbit/s: EU ICT impact study 2020 [check]
FIXED_J_PER_GB = 0.03 * JOULES_PER_KWH  # average of fixed networks: EU ICT impact study 2020 [check]
MOBILE_J_PER_GB = 0.14 * JOULES_PER_KWH  # average of mobile networks: the same [check]
WIFI_J_PER_GB = (0.283 + 0.137) * 8000  # W per Mbit/s of sender and receiver: Huang et al., MobiSys 2012 [check]

# An average is 450 times the marginal figure: the middle is the average, the low end what one more byte adds.
INTERNET_J_PER_GB = Bounds(MARGINAL_J_PER_GB, FIXED_J_PER_GB, MOBILE_J_PER_GB)
# Device to device within one Wi-Fi cell: two radios; the high end sends everything twice, through an access point.
D2D_J_PER_GB = Bounds(MARGINAL_J_PER_GB, WIFI_J_PER_GB, 2 * WIFI_J_PER_GB)

# On a device profile's watts. For the same loop of two busy threads, without counters, tools reported 4.6 to 237 W.
# Middle: the profile as given, by default Cloud Carbon Footprint's 2.28 W a busy thread, so 4.6 W. Low: codecarbon's
# process mode leaves at most 2.3 W for the CPU (of 11.5 W) and bills no idle share. High: carbontracker's
# 95 W without its PUE of 1.58, 60 W. eco2ai's guess of a 500 W processor (237 W) stays outside. docs/formulas.md.
BUSY_FACTOR = Bounds(0.5, 1.0, 13.0)
IDLE_FACTOR = Bounds(0.0, 1.0, 13.0)

# 0.392: Cloud Carbon Footprint (ccf-coefficients, constants.py: 0.000392 kWh per GB and hour). codecarbon 3.3.2 gives a
# module 5 W (external/ram.py): 0.08 with modules of 64 GB, 1.25 for the 8 GB of a laptop in two modules.
MEMORY_W_PER_GB = Bounds(0.08, 0.392, 1.25)


@dataclass(frozen=True, slots=True)
class Embodied:
    """What making a device emitted, and which part of it one node reserves.

    Attributes:
        total_g: TE of the SCI specification, the whole device.
        lifetime_s: over which TE is spread.
        share: of the device's resources that the node reserves.
    """

    total_g: Bounds
    lifetime_s: float
    share: float


# Assumptions. Server: 1,000 kg and 4 years are Cloud Carbon Footprint's one-socket rack server (ccf-coefficients,
# constants.py); 600 kg is a tenth of Dell's R710 (6,360 kg in all, over 90 % of it in use, Dell 2011); 4,000 kg stands
# for one with many SSDs [check]; a node has one of 64 threads. End device: 30 kg for a small board, 60 for a phone, 200
# for a laptop [check]; a node has one of 8 threads.
SERVER = Embodied(Bounds(600e3, 1000e3, 4000e3), 4 * YEAR_S, 1 / 64)
END_DEVICE = Embodied(Bounds(30e3, 60e3, 200e3), 4 * YEAR_S, 1 / 8)


@dataclass(frozen=True, slots=True)
class Constants:
    """Everything that turns seconds and bytes into joules and grams.

    Attributes:
        busy_factor: on `busy_w` of the device profile.
        idle_factor: on its `idle_w`.
        network_j_per_gb: for both ends and what is between; the middle is an average, not the marginal figure.
        embodied: by tier; assumptions, all of them.
        intensities: gCO2e per kWh by zone.
    """

    busy_factor: Bounds = BUSY_FACTOR
    idle_factor: Bounds = IDLE_FACTOR
    memory_w_per_gb: Bounds = MEMORY_W_PER_GB
    network_j_per_gb: Mapping[LinkClass, Bounds] = field(
        default_factory=lambda: {"cloud_edge": INTERNET_J_PER_GB, "edge_end": INTERNET_J_PER_GB, "d2d": D2D_J_PER_GB}
    )
    embodied: Mapping[Tier, Embodied] = field(
        default_factory=lambda: {Tier.CLOUD: SERVER, Tier.EDGE: SERVER, Tier.END: END_DEVICE}
    )
    intensities: Mapping[str, Intensity] = field(default_factory=lambda: INTENSITIES)
