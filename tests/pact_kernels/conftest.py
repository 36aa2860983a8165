"""What the tests of this folder share."""

from interpreting import patch_once_a_launch

from pact_kernels.backend import INTERPRETED

if INTERPRETED:
    patch_once_a_launch()
