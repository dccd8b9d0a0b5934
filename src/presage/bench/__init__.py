"""Measuring: arrivals, data sets, a streaming client, an open-loop generator, an in-process driver, and the measures both share.

Definitions follow one sheet: TTFT and E2EL count from the *scheduled* send time, TPOT is (E2EL - TTFT) / (tokens - 1).
"""
