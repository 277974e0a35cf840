"""How many steps are in flight, and when the next one is planned. Pure: it is told the time.

A step that is planned and not begun is closed to those who arrive: they wait for the one that runs
and for it. So while requests keep arriving, the next step is planned just before the running one
ends, which the device does not notice; steps last what those before them did. Where the device had
to wait after all, the way to it is longer than was thought, and plans leave earlier. At other times
a step is planned as soon as the one before it has begun, and no guess costs anything.
"""

from collections import deque

from engine_core.step_builder import StepInFlight
from engine_core.step_cost import StepCost
from ipc.config import SchedulerConfig

_SHORT_STEP_S = 0.001  # about twice the way from a result to the next plan
_LEAD_S, _LEAD_PER_ROW_S = 0.0015, 8e-6  # at first, from a plan to its launch, with a margin
_MIN_LEAD_S, _MAX_LEAD_S = 0.001, 0.005
_LEAD_RATE = 0.1  # how quickly it follows what the device had to wait
_TOLERATED_S, _LONGEST_WAIT_S = 0.00005, 0.001
_ARRIVAL_MEMORY_S = 1.0  # who has not been asked for so long is not expected to be asked


class Pipeline:
    """Owns the steps in flight, oldest first, and the guess when the oldest one ends."""

    def __init__(self, config: SchedulerConfig, cost: StepCost) -> None:
        self.steps: deque[StepInFlight] = deque()
        self._max_steps = config.max_steps_in_flight
        self._plans_late = config.plans_late and config.max_steps_in_flight is None
        self._cost = cost
        self._lead_s = _LEAD_S
        self._begun_s = 0.0  # the oldest step, as far as is known
        self._latest_arrival_s = float("-inf")

    @property
    def max_steps(self) -> int:
        """How many steps to plan before the first is answered.

        One that runs and one that waits keep a device busy, unless a step is shorter than the way
        from its result to the next plan; a third one would delay those who enter for nothing.
        """
        if self._max_steps is not None:
            return self._max_steps
        return 3 if self._cost.decodes_within(_SHORT_STEP_S) else 2

    @property
    def plan_due_s(self) -> float | None:
        """When to plan a step beside the one that runs; None: no reason to wait."""
        if not self._plans_late or len(self.steps) != 1 or self.max_steps != 2:
            return None
        if self._begun_s - self._latest_arrival_s > _ARRIVAL_MEMORY_S:
            return None
        step = self.steps[0]
        lasts_s = self._cost.expected_s(step.num_prompt_tokens)
        if lasts_s is None:
            return None
        return self._begun_s + lasts_s - self._lead_s - _LEAD_PER_ROW_S * len(step.rows)

    def wants_step(self, now_s: float) -> bool:
        """Whether to plan a step now."""
        due_s = self.plan_due_s
        return len(self.steps) < self.max_steps and (due_s is None or due_s <= now_s)

    def note_arrival(self, now_s: float) -> None:
        """A request came."""
        self._latest_arrival_s = now_s

    def begin(self, step: StepInFlight, now_s: float) -> None:
        """A step was planned."""
        if not self.steps:
            self._begun_s = now_s
        self.steps.append(step)

    def end(self, now_s: float, device_time_s: float) -> StepInFlight:
        """The oldest step was answered; the one behind it, if any, runs since then.

        Args:
            device_time_s: how long it ran; 0: not known.
        """
        step = self.steps.popleft()
        if device_time_s and step.planned_s < self._begun_s:
            waited_s = min(now_s - self._begun_s - device_time_s, _LONGEST_WAIT_S)
            lead_s = self._lead_s + _LEAD_RATE * (waited_s - _TOLERATED_S)
            self._lead_s = min(max(lead_s, _MIN_LEAD_S), _MAX_LEAD_S)
        self._begun_s = now_s
        return step
