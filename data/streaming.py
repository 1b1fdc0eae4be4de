"""Tokens that come one by one, as text."""

import codecs
import math


class Text:
    """What the tokens of a sample say. Bytes of an unfinished character wait for the next token, and so does what may
    become `stop`, before which the text ends; it ends after `limit` tokens too."""

    def __init__(self, codec, stop="", limit=math.inf):
        self.codec, self.stop, self.limit = codec, stop, limit
        self.decoder, self.waiting = codecs.getincrementaldecoder("utf-8")("replace"), ""
        self.said, self.count, self.ended = "", 0, False

    def add(self, token):
        """Take a token; returns the text that nothing can change any more."""
        self.count += 1
        return self._say(self.codec.decode_bytes([token]), last=self.count == self.limit)

    def end(self):
        """No token follows; returns the text that waited."""
        return "" if self.ended else self._say(b"", last=True)

    def _say(self, raw, last):
        text, held = self.waiting + self.decoder.decode(raw, final=last), 0
        self.ended = last
        if self.stop and self.stop in text:
            text, self.ended = text[: text.index(self.stop)], True
        elif not last:
            held = max((n for n in range(len(self.stop)) if text.endswith(self.stop[:n])), default=0)
        self.waiting, text = text[len(text) - held :], text[: len(text) - held]
        self.said += text
        return text
