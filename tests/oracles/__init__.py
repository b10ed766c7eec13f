"""Equations as loops over scalars: a second transcription of the papers."""
