"""Memory, peak and bandwidths of GPUs, as their makers state them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One of the eight GPUs of a node, connected by NVLink, with its own network adapter."""

    name: str
    memory_gib: float
    """Memory that a process can allocate."""
    peak_tflops: float
    """bfloat16, dense, 10^12 FLOP/s."""
    memory_gb_per_second: float
    nvlink_gb_per_second: float
    """One direction, all links together."""
    network_gb_per_second: float
    """One direction, per GPU."""


GPUS = {
    "a100": GPU(name="A100 SXM 80 GB", memory_gib=79, peak_tflops=312, memory_gb_per_second=2039,
                nvlink_gb_per_second=300, network_gb_per_second=25),
    "h100": GPU(name="H100 SXM 80 GB", memory_gib=79, peak_tflops=989, memory_gb_per_second=3350,
                nvlink_gb_per_second=450, network_gb_per_second=50),
    "h200": GPU(name="H200 SXM 141 GB", memory_gib=139, peak_tflops=989, memory_gb_per_second=4800,
                nvlink_gb_per_second=450, network_gb_per_second=50),
    "b200": GPU(name="B200 SXM 180 GB", memory_gib=178, peak_tflops=2250, memory_gb_per_second=7700,
                nvlink_gb_per_second=900, network_gb_per_second=50),
}
GPUS_BY_MEMORY = {
    "24gb": GPU(name="24 GB (rates of an RTX 4090)", memory_gib=23.5, peak_tflops=165, memory_gb_per_second=1008,
                nvlink_gb_per_second=25, network_gb_per_second=12),
    "40gb": GPU(name="40 GB (rates of an A100)", memory_gib=39.4, peak_tflops=312, memory_gb_per_second=1555,
                nvlink_gb_per_second=300, network_gb_per_second=25),
    "80gb": GPU(name="80 GB (rates of an A100)", memory_gib=79, peak_tflops=312, memory_gb_per_second=2039,
                nvlink_gb_per_second=300, network_gb_per_second=25),
}
"""GPUs by the size of their memory, whatever they are called."""
GPU_CHOICES = {**GPUS, **GPUS_BY_MEMORY}
"""What `--gpu` takes."""
GPUS_PER_NODE = 8


def gpu_named(device_name: str) -> GPU | None:
    """The entry for a device name of the driver, such as "NVIDIA H100 80GB HBM3"; None if it is not in the table.

    PCI Express cards with the same chip are not: their peak is lower.
    """
    words = device_name.upper().split()
    if any(word.startswith(("PCIE", "NVL")) for word in words):
        return None
    return next((gpu for key, gpu in GPUS.items() if any(word.startswith(key.upper()) for word in words)), None)
