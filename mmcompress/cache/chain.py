"""Several plans after one another: `[SnapKV(keep=0.25), MiKV(bits=2)]` drops three quarters and rounds what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .parts import Parts
from .plan import CachePlan, Need
from .slots import Slots
from .view import CacheView


@dataclass(frozen=True)
class Chain:
    """Plans that work on what the one before left. All reduce; how slots are held, and shared between layers, the last says."""

    plans: tuple[CachePlan, ...]

    def __post_init__(self) -> None:
        if not self.plans or not all(isinstance(plan, CachePlan) for plan in self.plans):
            raise ValueError(f"plans={self.plans!r}: one or more plans, such as (SnapKV(keep=0.25), MiKV(bits=2))")
        for name in ("again", "every"):
            if len({getattr(plan, name) for plan in self.plans}) > 1:
                raise ValueError(f"{name}= differs between {self}: plans of a chain compress in the same calls, so give all of "
                                 f"them the same")
        for plan in self.plans[:-1]:
            stores = type(plan).store is not CachePlan.store and not plan.may_lead
            if stores or type(plan).share is not CachePlan.share:
                raise ValueError(f"{type(plan).__name__} says how slots are held, so it comes last in a chain: {self}")
        self.plans[-1].follows(self.plans[:-1])

    def __str__(self) -> str:
        return " + ".join(type(plan).__name__ for plan in self.plans)

    @property
    def again(self) -> bool:
        return self.plans[0].again

    @property
    def every(self) -> int | None:
        return self.plans[0].every

    @property
    def needs(self) -> tuple[Need, ...]:
        return tuple(dict.fromkeys(need for plan in self.plans for need in plan.needs))

    @property
    def accumulates(self) -> bool:
        return any(plan.accumulates for plan in self.plans)

    def partner(self, layer: int, depth: int) -> int | None:
        return self.plans[-1].partner(layer, depth)

    def share(self, x: CacheView, below: Slots) -> tuple[Slots | Parts, Slots | Parts]:
        return self.plans[-1].share(self._before(x), below)

    def __call__(self, x: CacheView) -> Slots | Parts:
        return self.plans[-1](self._before(x))

    def _before(self, x: CacheView) -> CacheView:
        """What is left to the last plan."""
        for plan in self.plans[:-1]:
            new = plan.reduce(x)
            if new is not x.slots:
                x = replace(x, slots=new, intact=False)
        return x


def chain(plans: CachePlan | Chain | Sequence[CachePlan]) -> CachePlan | Chain:
    """One plan of one or several, which follow one another."""
    if isinstance(plans, (CachePlan, Chain)):
        return plans
    several = tuple(plans)
    return several[0] if len(several) == 1 and isinstance(several[0], CachePlan) else Chain(several)
