"""The HTTP front: an OpenAI-compatible server over anything that answers the ``EngineClient`` protocol."""
