"""kvshare inside SGLang: the only room that imports it. Files in the order of a request's life."""
