"""Qwen2.5-VL's tower: Qwen2-VL's, whose images are cut into windows in most layers."""

from .qwen2_vl import qwen2_vl_forward

qwen2_5_vl_forward = qwen2_vl_forward
