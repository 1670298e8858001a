"""Several machines: an agent on each starts and watches the ranks there, as the supervisor does on one machine."""
