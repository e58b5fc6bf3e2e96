"""All cases. Importing this module registers them, in the order in which they are listed."""

from importlib import import_module

MODULES = (
    "speed.generation",
    "speed.kv_compress",
    "speed.bits",
    "speed.prompt",
    "speed.pod",
    "speed.serving",
    "speed.workloads",
    "speed.saved",
    "speed.turns",
    "speed.demo",
    "kvpress.speed",
    "kvpress.tasks",
    "peers.packages",
    "quality.requests",
    "quality.divergence",
    "gpu.checks",
    "gpu.kernels",
    "gpu.models",
    "gpu.serving",
)

for module in MODULES:
    import_module(f".{module}", __package__)
