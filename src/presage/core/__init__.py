"""Plain data shared by every room: requests, plans, events, protocols, errors. No torch, no sockets, no wall clock."""
