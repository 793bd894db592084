"""Network cards for pods: a CNI plugin over the agent."""
