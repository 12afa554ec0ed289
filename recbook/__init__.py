"An executable book of LLM-era recommender research."
__version__ = "0.1.0"
