"""Speech: sounds as they are found, and three ways to make positions of the stream of them.

| kind | a position is | learned | back to sound |
|---|---|---|---|
| `dmel` | a frame: a level for each mel channel | nothing | Griffin-Lim |
| `units` | a frame: the nearest of some k-means codes | the codes | Griffin-Lim |
| `codec` | a frame of a neural codec: a code of each codebook | elsewhere: a Transformers folder | its decoder |
"""

from zoo.modalities.speech.codec import Codec
from zoo.modalities.speech.dmel import DMel
from zoo.modalities.speech.sounds import Sound, SoundConfig, SoundError, open_sound
from zoo.modalities.speech.spectrum import MelConfig, Spectrum
from zoo.modalities.speech.units import Units

__all__ = [
    "Codec",
    "DMel",
    "MelConfig",
    "Sound",
    "SoundConfig",
    "SoundError",
    "Spectrum",
    "Units",
    "open_sound",
]
