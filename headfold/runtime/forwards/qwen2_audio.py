"""Qwen2-Audio's tower: Whisper's encoder."""

from .whisper import whisper_forward

qwen2_audio_forward = whisper_forward
