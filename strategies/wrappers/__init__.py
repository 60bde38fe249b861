"""Wrappers: what stands around a strategy and composes with it, looked up in `WRAPPERS`."""

from fedlora.strategies.wrappers.base import Wrapper
from fedlora.strategies.wrappers.coordinate import CoordinateMedian, TrimmedMean
from fedlora.strategies.wrappers.fedprox import FedProx
from fedlora.strategies.wrappers.geometric_median import GeometricMedian
from fedlora.strategies.wrappers.krum import Krum, MultiKrum
from fedlora.strategies.wrappers.lodd import Lodd
from fedlora.strategies.wrappers.norm_cap import NormCap
from fedlora.strategies.wrappers.scaffold import Scaffold
from fedlora.strategies.wrappers.server_optimizer import FedAdagrad, FedAdam, FedMomentum, FedYogi

WRAPPERS: dict[str, type[Wrapper]] = {
    CoordinateMedian.name: CoordinateMedian,
    FedAdagrad.name: FedAdagrad,
    FedAdam.name: FedAdam,
    FedMomentum.name: FedMomentum,
    FedProx.name: FedProx,
    FedYogi.name: FedYogi,
    GeometricMedian.name: GeometricMedian,
    Krum.name: Krum,
    Lodd.name: Lodd,
    MultiKrum.name: MultiKrum,
    NormCap.name: NormCap,
    Scaffold.name: Scaffold,
    TrimmedMean.name: TrimmedMean,
}

__all__ = ["WRAPPERS", "Wrapper"]
