"""Recording clips: a Gymnasium environment is played, or a Minari data set read, into a folder that `RecordedFolder` reads."""
