//! Work that the engine's fuel does not see: values written out, compared, converted or joined as a whole.
//!
//! Fuel pays for instructions and for the bytes of what they make, after they are made. A list that holds
//! itself twice, thirty times over (`[x, x]`), costs thirty instructions and is a tree of a billion leaves
//! when it is written; one that is joined with itself (`x + x`) is copied whole, unpaid, at the 33rd time.
//! So a container is walked here, each step paid for, before it is written or converted ([`check`]), and
//! before it gets a name by which it could grow ([`keep`], which [`super::source`] puts around every value
//! that is assigned).

use minijinja::{Error, ErrorKind, Output, State, Value, escape_formatter, value::ValueKind};

/// Deepest nesting of a value; JSON of a request has at most 128.
const MAX_DEPTH: usize = 200;
/// Most values in a value that has a name, and most bytes of their strings, each as often as it is there. A
/// conversation of 4,000 messages has 20 thousand values.
const MAX_VALUES: u64 = 1 << 20;
const MAX_BYTES: usize = 64 << 20;
/// Values walked per unit of fuel. Naming walks what is only referred to, again and again in a loop that
/// collects, and is ten times cheaper than writing.
const WALKED_PER_FUEL: u64 = 2;
const NAMED_PER_FUEL: u64 = 32;
/// Bytes that a unit of fuel pays for, as in the engine.
const BYTES_PER_FUEL: usize = 64;

/// Pays for making so many bytes.
pub(super) fn pay(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    state.consume_fuel((bytes / BYTES_PER_FUEL) as u64)
}

/// Pays for writing the whole of a value; fails for one that is too deep.
pub(super) fn check(state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    if !is_container(value) {
        return Ok(());
    }
    let mut walk = Walk { state, per_fuel: WALKED_PER_FUEL, values: 0, bytes: 0, most: u64::MAX };
    walk.visit(value, 0)?;
    pay(state, walk.bytes)
}

/// [`check`] of several.
pub(super) fn check_all<'v>(
    state: &State<'_, '_>,
    values: impl IntoIterator<Item = &'v Value>,
) -> Result<(), Error> {
    values.into_iter().try_for_each(|value| check(state, value))
}

/// The value itself, unless it is too large to get a name.
pub(super) fn keep(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    if is_container(&value) {
        let mut walk = Walk { state, per_fuel: NAMED_PER_FUEL, values: 0, bytes: 0, most: MAX_VALUES };
        walk.visit(&value, 0)?;
    }
    Ok(value)
}

/// The engine's formatter, after [`check`].
pub(super) fn write(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    check(state, value)?;
    escape_formatter(out, state, value)
}

fn is_container(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable)
}

struct Walk<'a, 't, 'e> {
    state: &'a State<'t, 'e>,
    per_fuel: u64,
    values: u64,
    bytes: usize,
    most: u64,
}

impl Walk<'_, '_, '_> {
    fn visit(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.values += 1;
        if self.values.is_multiple_of(self.per_fuel) {
            self.state.consume_fuel(1)?;
        }
        if let Some(text) = value.as_str() {
            self.bytes = self.bytes.saturating_add(text.len());
        }
        if self.values > self.most || self.bytes > MAX_BYTES {
            let problem = format!("a value of more than {MAX_VALUES} values or {MAX_BYTES} bytes");
            return Err(Error::new(ErrorKind::InvalidOperation, problem));
        }
        if !is_container(value) {
            return Ok(());
        }
        if depth == MAX_DEPTH {
            let problem = format!("a value nested more than {MAX_DEPTH} deep");
            return Err(Error::new(ErrorKind::InvalidOperation, problem));
        }
        let is_map = value.kind() == ValueKind::Map;
        for item in value.try_iter()? {
            if is_map {
                self.visit(&value.get_item(&item)?, depth + 1)?;
            }
            self.visit(&item, depth + 1)?;
        }
        Ok(())
    }
}
