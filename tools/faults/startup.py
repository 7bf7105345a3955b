"""Start-up: what is compiled ahead, and what becomes of the threads that do it."""

from faults.table import fault

# fmt: off
STARTUP, LAUNCH = "cuqwen/startup.py", "cuqwen/launch.py"
LISTED = "startup::what_is_listed_is_what_is_launched"

fault("one-layer-shows-all", STARTUP, "del model.weights.layers[1:-1]", "del model.weights.layers[1:]", LISTED)
fault("sample-not-listed", STARTUP, "        dry.operations.sample(logits[0])\n", "", LISTED)
fault("single-tokens-not-listed", STARTUP, "[1] if is_portable else []", "[]", LISTED)
fault(
    "long-prompts-not-listed", STARTUP, "*prompts, min(5120, plan.chunk), plan.chunk)", "*prompts)",
    "startup::on_hopper_all_that_prompts_need_is_listed",
)
fault(
    "noting-in-all-threads", LAUNCH, "class _Thread(threading.local):", "class _Thread:",
    "startup::noting_is_for_one_thread_and_ends_with_its_block",
)
fault(
    "noting-goes-on", LAUNCH, "        _thread.noted = None\n", "        pass\n",
    "startup::noting_is_for_one_thread_and_ends_with_its_block",
)
fault(
    "compiling-goes-on-after-an-error", STARTUP, "pool.shutdown(cancel_futures=True)", "pool.shutdown()",
    "startup::what_has_not_begun_is_left_out_when_the_block_fails",
)
fault(
    "kernels-not-awaited", STARTUP, "        begun.result()\n        missing", "        missing",
    "startup::all_is_compiled_when_the_block_ends_and_nobody_is_told_what_is_quick",
)
