"""Comparisons with float64 on sixteen CPU devices: `python -m tests.longctx.parallel.sixteen`."""

import jax

from tests.longctx.parallel import test_context, test_lasp

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 16)
    for strategy in ("ring", "all_gather"):
        test_context.check_error(strategy, 16)
    test_lasp.check_error(16)
