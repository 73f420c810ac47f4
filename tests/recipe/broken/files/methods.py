"""Methods of the broken recipes."""


class Mine:
    pass
