// A function without a server of its own: thaw deploy adds one. See docs/functions.md.
'use strict';

let seen = 0; // what is outside of the function is made once for each instance, and lives as long as it

exports.handle = async (request) => {
  seen++;
  if (request.method === 'POST') {
    const { numbers } = await request.json();
    return { sum: numbers.reduce((a, b) => a + b, 0) };
  }
  return `Hello ${process.env.TARGET || 'World'}, request ${seen} of this instance\n`;
};
