"""The loop (receive, admit, schedule, draft, execute, verify, emit), its drivers, the decision log, and the LLM / AsyncLLM classes."""
