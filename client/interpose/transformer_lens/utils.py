"""`import interpose.transformer_lens.utils as utils`."""

from ..lens import act_name as get_act_name

__all__ = ["get_act_name"]
