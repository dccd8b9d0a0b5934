"""Models: declarative families (one file per Hugging Face model_type) and checkpoint loading."""
