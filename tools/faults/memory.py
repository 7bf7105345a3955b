"""The memory plan."""

from faults.table import fault

# fmt: off
MEMORY, BY_HAND = "cuqwen/memory.py", "memory::0_6b_by_hand"
ALLOCATED, FITS = "memory::the_plan_is_what_is_allocated", "memory::the_largest_context_that_fits"

fault(
    "plan-half-a-cache", MEMORY, "return self.context * self.bytes_per_token",
    "return self.context * self.bytes_per_token // 2", BY_HAND, ALLOCATED,
)
fault("plan-vectors-as-stored", MEMORY, "or len(shape) == 1 else", "else", BY_HAND)
fault(
    "plan-counts-what-is-not-there", MEMORY, "if not (on_tensor_cores and c.head_dim in (64, 128)):", "if True:", ALLOCATED,
)
fault("plan-spends-all", MEMORY, "else (1 - SPARE) * free", "else (1 + SPARE) * free", FITS)
fault("plan-one-grain-too-many", MEMORY, "fitting = math.floor(", "fitting = math.ceil(", FITS)
fault(
    "plan-refused-too-late", "cuqwen/api.py",
    "plan = memory.plan(folder, config, place, kv, max_context, exact=exact)",
    "plan = memory.plan(folder, config, place, kv, None, exact=exact)",
    "memory::load_follows_the_plan",
)
