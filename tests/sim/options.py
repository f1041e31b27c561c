"""What may go wrong in a history: one field per fault, all of them off by default."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from random import Random


@dataclass(frozen=True, slots=True)
class Options:
    """The faults of one history; chances are per message, call or effect."""

    delay: float = 0.0
    """Chance that a message, or a call of the kernel, takes many ticks."""
    reorder: bool = False
    """What is due in the same tick happens in any order."""
    duplicate: float = 0.0
    """Chance that a request arrives twice."""
    lost_request: float = 0.0
    """Chance that a request does not arrive: it is repeated under its request_id."""
    lost_reply: float = 0.0
    """Chance that what was carried out is not heard of: repeated, as above."""
    pause: float = 0.0
    """Chance that another thread enters the core between two local effects."""
    rude: float = 0.0
    """Chance that a VMM converts without MADV_DONTNEED before."""
    small_pool: bool = False
    """The pool has fewer folios than the VMs together want."""
    vmemmap_short: bool = False
    """Somebody takes base memory, which splits need for their vmemmap."""
    poison: float = 0.0
    """Chance that a step brings a memory error somewhere, or has one forgotten."""
    endings: bool = False
    """Files are closed, memslots and VMs deleted, clients killed, in mid-flight."""

    @classmethod
    def draw(cls, random: Random) -> Options:
        """Draw which faults a history has (swarm), and how strong they are."""
        return cls(
            delay=_some(random, 0.4),
            reorder=random.random() < 0.7,
            duplicate=_some(random, 0.3),
            lost_request=_some(random, 0.2),
            lost_reply=_some(random, 0.3),
            pause=_some(random, 0.3),
            rude=_some(random, 0.6),
            small_pool=random.random() < 0.25,
            vmemmap_short=random.random() < 0.4,
            endings=random.random() < 0.5,
            poison=_some(random, 0.02) if random.random() < 0.6 else 0.0,
        )

    def healed(self) -> Options:
        """The same world without a fault, as in the liveness phase."""
        return replace(Options(), reorder=self.reorder)

    def __str__(self) -> str:
        """Name what is on: `delay=0.2 reorder small_pool`."""
        words = []
        for option in fields(self):
            value = getattr(self, option.name)
            if value is True:
                words.append(option.name)
            elif value:
                words.append(f"{option.name}={value:.2f}")
        return " ".join(words) or "no faults"


def _some(random: Random, most: float) -> float:
    return random.random() * most if random.random() < 0.6 else 0.0
