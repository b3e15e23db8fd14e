"""A command of another distribution."""


def count_letters(args):
    """Print how many letters the arguments have.

    The exit status is 3.
    """
    print(f"{sum(map(len, args))} letters")
    return 3
