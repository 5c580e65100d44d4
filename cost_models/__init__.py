"""Prices: whatever knows hardware. A cost model gives what an option costs, in bytes, flops or seconds."""

from geofx.cost_models.contract import CostModel as CostModel
from geofx.cost_models.contract import Device as Device
from geofx.cost_models.counts import Flops as Flops
from geofx.cost_models.counts import Size as Size
from geofx.cost_models.devices import DEVICES as DEVICES
from geofx.cost_models.measured import Measured as Measured
from geofx.cost_models.roofline import Roofline as Roofline
