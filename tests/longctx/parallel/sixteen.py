"""Comparisons with float64 on sixteen devices, which the process that runs this must have."""

from tests.longctx.parallel import test_context, test_lasp

if __name__ == "__main__":
    for strategy in ("ring", "all_gather"):
        test_context.check_error(strategy, 16)
    test_lasp.check_error(16)
