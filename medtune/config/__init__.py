"""What can be chosen, and how what is typed becomes a RunConfig.

It loads no torch. Importing it registers the resolvers, so that any process that loads the schema has them.
"""

from medtune.config import resolvers  # noqa: F401
