"""kalmagrove serve: a model over HTTP, in the style of OpenAI's API."""
