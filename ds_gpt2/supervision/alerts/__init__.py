"""Messages to a person who is elsewhere: what they say, how many go out, and the ways they go."""
