"""The other clock: the engine's own loop under virtual time, with a latency model for the executor and an oracle for the logits.

    from presage.simulate.run import simulate

Nothing here imports torch, and no policy is written twice: schedulers, cache, cutter and programs are the engine's objects.
"""
