"""Property tests draw the same examples each time and take the time they need."""

from hypothesis import settings

settings.register_profile('same', deadline=None, derandomize=True, database=None)
settings.load_profile('same')
