"""From a history to the conversations that teach one voice, stage by stage; each says what it kept and why not more."""
