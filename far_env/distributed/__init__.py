"""Work on several processes and machines by actors of Ray core (extra ``ray``), which is imported where it is used."""
