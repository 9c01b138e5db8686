"""What `import longctx.nn` costs its user."""

import subprocess
import sys

HEAVY = ("grain", "orbax", "tyro", "rich", "matplotlib")


def loaded_by(module):
    program = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return done.stdout


def test_importing_the_modules_loads_no_more_than_flax_does():
    assert loaded_by("longctx.nn, longctx.models") == loaded_by("flax.nnx")
