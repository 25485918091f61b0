"""What a card reports of itself while it works, read only, through NVML (the PyPI package nvidia-ml-py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from marlin_gen import driver


@dataclass(frozen=True)
class CardState:
    """One sample; a field is None where the card or this machine does not tell."""

    sm_clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None


class Card:
    """The card behind a CUDA device. Without NVML every sample is empty: it is a report, never a condition."""

    def __init__(self, device_index: int) -> None:
        self._nvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            bus = driver.call("cuDeviceGetPCIBusId", 32, driver.call("cuDeviceGet", device_index))
            self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus.split(b"\0")[0])
            self._nvml = pynvml
        except (ImportError, OSError, driver.LaunchError):
            return
        except Exception as error:  # pynvml.NVMLError, which has no name without the import
            if type(error).__module__ != "pynvml":
                raise

    def sample(self) -> CardState:
        if not self._nvml:
            return CardState()
        milliwatts = self._read("nvmlDeviceGetPowerUsage")
        return CardState(
            sm_clock_mhz=self._read("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
            power_w=None if milliwatts is None else milliwatts / 1000,
            temperature_c=self._read("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU),
        )

    def driver_version(self) -> str | None:
        """Of the kernel driver, such as 580.159.04."""
        if not self._nvml:
            return None
        version = self._nvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)

    def _read(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError:  # not supported on this card
            return None
