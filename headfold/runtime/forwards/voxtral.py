"""Voxtral's tower: Whisper's encoder."""

from .whisper import whisper_forward

voxtral_forward = whisper_forward
