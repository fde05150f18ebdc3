//! Python's `textwrap.wrap`, as far as Jinja's `wordwrap` uses it: tabs and line breaks are left as they
//! are, white space at the ends of lines is dropped.

/// A character of a word to Python's regular expressions.
pub(super) fn is_word(character: char) -> bool {
    character == '_' || character.is_alphanumeric()
}

fn is_space(character: char) -> bool {
    matches!(character, '\t' | '\n' | '\u{b}' | '\u{c}' | '\r' | ' ')
}

fn is_letter(character: char) -> bool {
    is_word(character) && !character.is_numeric()
}

fn is_word_or_mark(character: char) -> bool {
    is_word(character) || matches!(character, '!' | '"' | '\'' | '&' | '.' | ',' | '?')
}

/// The lines of a paragraph, each of at most `width` characters if words may be broken.
pub(super) fn wrap(text: &str, width: usize, break_long_words: bool, break_on_hyphens: bool) -> Vec<String> {
    let text: Vec<char> = text.chars().collect();
    let mut chunks: Vec<&[char]> = chunks(&text, break_on_hyphens);
    chunks.reverse();
    let blank = |chunk: &[char]| chunk.iter().all(|c| c.is_whitespace());
    let mut lines: Vec<String> = Vec::new();
    while let Some(&next) = chunks.last() {
        let mut line: Vec<&[char]> = Vec::new();
        let mut length = 0;
        if blank(next) && !lines.is_empty() {
            chunks.pop();
        }
        while let Some(&next) = chunks.last().filter(|next| length + next.len() <= width) {
            length += next.len();
            line.push(next);
            chunks.pop();
        }
        if let Some(&long) = chunks.last().filter(|next| next.len() > width) {
            chunks.pop();
            if break_long_words {
                let (head, tail) = long.split_at(break_at(long, width - length, break_on_hyphens));
                line.push(head);
                chunks.extend((!tail.is_empty()).then_some(tail));
            } else if line.is_empty() {
                line.push(long);
            } else {
                chunks.push(long);
            }
        }
        if line.last().is_some_and(|last| blank(last)) {
            line.pop();
        }
        if !line.is_empty() {
            lines.push(line.concat().into_iter().collect());
        }
    }
    lines
}

/// Where a word that fits no line is cut: behind its last hyphen that fits, if there is one.
fn break_at(word: &[char], space: usize, break_on_hyphens: bool) -> usize {
    let hyphen = word[..space.min(word.len())].iter().rposition(|&c| c == '-').filter(|&at| {
        break_on_hyphens && word.len() > space && at > 0 && word[..at].iter().any(|&c| c != '-')
    });
    hyphen.map_or(space, |at| at + 1)
}

/// Runs of white space, and the pieces between which a line may be broken.
fn chunks(text: &[char], break_on_hyphens: bool) -> Vec<&[char]> {
    let mut chunks = Vec::new();
    let mut start = 0;
    while start < text.len() {
        let end = chunk_end(text, start, break_on_hyphens);
        chunks.push(&text[start..end]);
        start = end;
    }
    chunks
}

fn chunk_end(text: &[char], start: usize, break_on_hyphens: bool) -> usize {
    let run = |from: usize, of: &dyn Fn(char) -> bool| {
        text[from..].iter().position(|&c| !of(c)).map_or(text.len(), |length| from + length)
    };
    if is_space(text[start]) {
        return run(start, &is_space);
    }
    if !break_on_hyphens {
        return run(start, &|c| !is_space(c));
    }
    // Two or more hyphens between words.
    let dash_at = |at: usize| {
        let end = run(at, &|c| c == '-');
        let between = at > 0 && is_word_or_mark(text[at - 1]);
        (between && end >= at + 2 && text.get(end).is_some_and(|&c| is_word(c))).then_some(end)
    };
    if let Some(end) = dash_at(start) {
        return end;
    }
    let letter = |at: Option<usize>| at.and_then(|at| text.get(at)).is_some_and(|&c| is_letter(c));
    let hyphen = |at: Option<usize>| at.and_then(|at| text.get(at)) == Some(&'-');
    for end in start + 1..=text.len() {
        if hyphen(Some(end)) {
            let after = end + 1;
            let behind = letter(after.checked_sub(2))
                && (letter(after.checked_sub(3))
                    || (hyphen(after.checked_sub(3)) && letter(after.checked_sub(4))));
            let ahead = letter(Some(after))
                && (letter(Some(after + 1)) || (hyphen(Some(after + 1)) && letter(Some(after + 2))));
            if behind && ahead {
                return after;
            }
        }
        if end == text.len() || is_space(text[end]) || dash_at(end).is_some() {
            return end;
        }
    }
    text.len()
}
